# The C++ extension; csrc/cpu/bind.cpp says what is in it. Its only callers are fastsae/backends/cpu*.py.
from typing import Any

def __getattr__(name: str) -> Any: ...
