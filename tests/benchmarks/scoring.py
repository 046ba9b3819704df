"""What judging a run costs, from its own events: scoring a token against training on one, and its share of the run.

Usage: scoring.py RUN_DIRECTORY (of a finished run that was never resumed)
"""

import itertools
import json
import sys
from pathlib import Path

from bizassist_nb.api import Run
from bizassist_nb.runs import records

run = Run(Path(sys.argv[1]))
data = run.last(records.Data)
scoring = [event.seconds for event in run.events if isinstance(event, records.Evaluation)]
training = sum(step.seconds for step in run.steps)
states = [(event.time, event.state) for event in run.events if isinstance(event, records.State)]
spent: dict[str, float] = {}
for (start, state), (end, _) in itertools.pairwise(states):
    spent[state] = spent.get(state, 0) + end - start
a_token = {
    "scoring": sum(scoring) / len(scoring) / data.held_out.tokens,
    "training": training / sum(step.tokens for step in run.steps),
}
print(
    json.dumps(
        {
            "milliseconds_a_token": {what: 1000 * seconds for what, seconds in a_token.items()},
            "scoring_to_training": a_token["scoring"] / a_token["training"],
            "seconds_in_state": spent,
            "judging_share_of_the_run": (spent["scoring"] + spent["answering"]) / sum(spent.values()),
            "device": run.environment.device,
            "versions": run.environment.versions,
        }
    )
)
