"""What the tests of bench.gpu share: its settings at toy size, and a made-up machine."""

from bench.gpu.plan import Settings

TOY = Settings(device="cpu", size="toy", backends=("cpu", "reference"))
MACHINE = {"device": "a machine", "source": "0" * 12, "torch": "2", "triton": None, "size": "toy", "plant": None,
           "commit": "abc", "date": "2026-01-01"}  # fmt: skip
