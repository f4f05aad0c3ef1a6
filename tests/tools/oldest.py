"""The oldest versions that setup.cfg allows, as constraints for pip. Run by `make test-oldest`; needs only Python."""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def constraints(requirements: str) -> list[str]:
    """``torch>=2.9`` becomes ``torch==2.9.*`` and ``tenacity>=9`` ``tenacity==9.0.*``.

    What has no lower bound is left to pip.
    """
    lines = []
    for line in requirements.splitlines():
        bound = re.match(r"\s*([\w.-]+)>=([\d.]+)", line)
        if bound:
            oldest = bound[2] if "." in bound[2] else f"{bound[2]}.0"
            lines.append(f"{bound[1]}=={oldest}.*")
    return lines


if __name__ == "__main__":
    parser = configparser.ConfigParser()
    parser.read(SETUP)
    sys.stdout.write("\n".join(constraints(parser["options"]["install_requires"])) + "\n")
