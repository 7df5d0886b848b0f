"""Commands that are run around the method: demo data, own data, report, benchmark, ablation."""
