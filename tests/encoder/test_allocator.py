"""Freed memory stays in the process, so that taking it again costs no page faults."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import ctypes, resource, sys
sys.path.insert(0, {source!r})
from codiemb.encoder.allocator import keep_memory
if {kept}:
    assert keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100 << 20)))
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert "torch" not in sys.modules
"""


def faults(kept: bool) -> int:
    from codiemb import errors

    source = errors.__file__.rsplit("/codiemb/", 1)[0]
    command = [sys.executable, "-c", COUNT_FAULTS.format(source=source, kept=kept)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_that_is_taken_again_brings_no_faults():
    """The third time 100 MiB are written to; without `keep_memory` each page is a fault."""
    assert faults(kept=True) < 100
    assert faults(kept=False) > 1000
