"""python -m bench.gpu: see bench/gpu/parent.py."""

import sys

from bench.gpu.parent import main

sys.exit(main())
