"""The peak of memory that a process tells of itself."""

import subprocess
import sys

from ckptfuse.peak import peak_memory

TOLD = "from ckptfuse.peak import peak_memory; print(peak_memory())"


def test_the_peak_is_what_was_held_and_not_what_the_process_before_held() -> None:
    held = bytes(range(256)) * (200 * 2**12)  # 200 MiB
    assert peak_memory() > len(held)
    said = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, check=True)
    assert 2**20 < int(said.stdout) < len(held)
