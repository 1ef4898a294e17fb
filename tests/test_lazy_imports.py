"""Names loaded on first use."""

import subprocess
import sys


def test_importing_a_module_does_not_hide_the_function_of_its_name():
    code = (
        "import copa_harness.tasks.extraction, copa_harness.tasks as tasks; from copa_harness.tasks import extraction; "
        "assert callable(extraction) and callable(tasks.extraction)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
