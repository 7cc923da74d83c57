"""python -m lora_ops doctor"""

import sys

from .doctor import main

USAGE = """usage: python -m lora_ops doctor

    doctor    what is installed, which kernels run here, and on a GPU a self-test and a short bench: a minute"""

if __name__ == "__main__":
    if sys.argv[1:] == ["doctor"]:
        sys.exit(main())
    print(USAGE)
    sys.exit(0 if len(sys.argv) == 1 or sys.argv[1:] in (["-h"], ["--help"]) else 2)
