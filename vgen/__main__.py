"""`python -m vgen COMMAND …`: the same as `vgen COMMAND …`."""

import sys

from vgen.cli.main import main

sys.exit(main())
