"""Memory of a process is its own."""

import subprocess
import sys

from nnunet_deform.processes.memory import most_resident

ASK = "from nnunet_deform.processes.memory import most_resident; print(most_resident())"


def test_the_most_a_process_held_is_not_its_parents():
    ballast = b"x" * 2**28
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert 2**22 < int(asked.stdout) < len(ballast) < most_resident()
