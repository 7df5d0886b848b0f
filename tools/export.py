"""Write a trained network as an ONNX file.

python -m tools.export --weights runs/NAME/selftrain.pth --out my.onnx

It maps an image (1, 3, H, W), RGB in [0, 1], to logits (1, K, H, W), for any H and W. Its metadata
hold class names, colours and val.size. Needs `pip install -r tools/requirements.txt`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from engine.command import Parser, command
from engine.config import UserError
from engine.files import load_tensors, write_atomically
from models import load
from settings import load_saved


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="a checkpoint")
    add("--out", required=True, metavar="FILE", help="the ONNX file to write")
    add("overrides", nargs="*", metavar="key.sub=value", help="replaces a value, such as val.size")
    args = parser.parse_intermixed_args()
    network = load(args.weights)
    cfg = load_saved(load_tensors(args.weights)["config"], args.overrides, args.weights)
    written = export(network, cfg.val.size or cfg.crop)
    write_atomically(args.out, lambda temporary: temporary.write_bytes(written))
    print(f"{args.out}: written, for images of any size, {len(network.classes)} classes")


def export(network, size):
    """Return the bytes of an ONNX file of a Predictor.

    size: (H, W) of the image that it is traced with. Raises UserError where the file's logits are
    not the network's, at this size or at another one.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX export needs `pip install -r tools/requirements.txt`") from error
    sides = [dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)]
    ends = {"input_names": ["image"], "output_names": ["logits"], "dynamic_shapes": sides}
    image = torch.zeros(1, 3, *size)
    program = torch.onnx.export(network, (image,), dynamo=True, verbose=False, **ends)
    colours = list(network.colours.values())
    for key, value in {"classes": network.classes, "colours": colours, "size": size}.items():
        program.model.metadata_props[key] = json.dumps(value)
    written = program.model_proto.SerializeToString()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises is reported below
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    for height, width in (size, [side * 3 // 4 + 5 for side in size]):
        image = torch.rand(1, 3, height, width)
        with torch.no_grad():
            expected = network(image).numpy()
        try:
            logits = session.run(None, {"image": image.numpy()})[0]
            off = np.abs(logits - expected).max() / max(np.abs(expected).max(), 10)
        except Exception:  # of onnxruntime, on the size that was written as a constant
            off = np.inf
        if not off < 1e-4:  # rounding is up to 5e-5 of the largest logit
            fault = f"at {[height, width]}, ONNX's logits are off by {off:.2g} of the largest"
            reason = "the network has a layer that cannot be written for images of any size"
            raise UserError(f"ONNX export: {fault}; {reason}")
    return written


if __name__ == "__main__":
    command(main)
