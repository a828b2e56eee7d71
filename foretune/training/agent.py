"""torchrun's elastic agent, with warm spares: it does the rendezvous and watches, `training.spare` forks the ranks.

    python -m foretune.training.agent RUN

in (stdin): one JSON line a launch, ``{"ranks": N, "arguments": [...]}``   out (stdout): one line for each launch,
``{"exits": {"0": code, ...}, "first": [0]}`` (a negative code is a signal's number; `first` are the ranks that had
failed when the agent noticed and killed the rest).

It stays between launches, so that a restart costs a fork and a rendezvous. When one rank ends badly the others are
killed at once: they could only wait for it. Restarts are the supervisor's decision (``max_restarts`` is 0 here).

The spare is started before torch is imported here (`foretune.training.elastic`, 3 s): both import at a time.
"""

from __future__ import annotations

import json
import sys

from foretune.distributed import die_with_parent
from foretune.training.spare import messages_alone_on_stdout
from foretune.training.spare_process import Spare


def main() -> None:
    """Serve launches until stdin closes."""
    die_with_parent()
    say = messages_alone_on_stdout()
    spare = Spare(sys.argv[1])
    from foretune.training.elastic import launch  # not before: see the head of this file

    spare.wait_until_ready()
    for line in sys.stdin:
        order = json.loads(line)
        say(launch(spare, ranks=order["ranks"], arguments=order["arguments"]))


if __name__ == "__main__":
    main()
