"""``python -m sqat``, which is also what ``accelerate launch -m sqat`` starts."""

import sys

from sqat.cli import main

sys.exit(main())
