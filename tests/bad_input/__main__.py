"""Print the page of bad inputs."""

import sys

from tests.bad_input import page

sys.stdout.write(page())
