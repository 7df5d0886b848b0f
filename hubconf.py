"""torch.hub.load(FOLDER, "diga", CHECKPOINT, source="local") is models.load(CHECKPOINT)."""

from models import load as diga  # noqa: F401

dependencies = ["torch", "torchvision", "cv2", "filelock", "yaml"]
