"""What the tests of bench.gpu share: its settings in a rehearsal, and a made-up machine."""

from bench.gpu.plan import Settings

TOY = Settings(device="cpu", size="toy", backends=("cpu",))
MACHINE = {"device": "a machine", "torch": "2", "triton": None, "size": "toy", "commit": "abc", "date": "2026-01-01",
           "folder": "a-machine", "backends": {"cpu": {"available": True, "reason": None, "detail": {}}}}  # fmt: skip
