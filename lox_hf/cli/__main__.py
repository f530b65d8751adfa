"""`python -m lox_hf.cli`."""

import sys

from lox_hf.cli.main import main

sys.exit(main())
