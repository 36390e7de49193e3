"""What this host says of itself before a start, as JSON on standard output; asked over ssh by launch/lib/hosts.py.

Standard input is a JSON object: arguments of train.py, folder, ranks (of the whole job), port (that rank 0 would listen
on, or null), towards (a host whose network is the job's, or null).
"""

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from irtune.config import load_config  # noqa: E402
from irtune.config.deepspeed_json import read_engine_json  # noqa: E402
from irtune.distributed import network, node_facts  # noqa: E402
from irtune.errors import ConfigError, IrtuneError  # noqa: E402


def main() -> int:
    """Answer; or one line per problem on standard error, and status 2."""
    asked = json.loads(sys.stdin.readline())
    try:
        os.chdir(asked["folder"])
        config = load_config(asked["arguments"])
        settings, problems = read_engine_json(config, asked["ranks"])
        if problems:
            raise ConfigError(problems)
        facts = node_facts.about_host(config, settings, asked["port"])
        with contextlib.suppress(OSError):  # a name that only ssh knows
            facts["address"] = network.address_towards(asked["towards"] or "localhost")
    except IrtuneError as error:
        sys.stderr.write("\n".join(getattr(error, "problems", [str(error)])) + "\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
