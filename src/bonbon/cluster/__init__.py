"""Sampling and scoring by Ray's workers: `engine: ray`.

**How it works.** One Ray Data pipeline reads shard numbers, samples, scores and writes. Only
numbers flow through Ray: a worker reads its shard from the run's storage, does the same work as a
run without Ray (`runs.shard_work`), and writes the result, whole or not at all. Sampling
and scoring overlap. Each has a pool of workers that grows and shrinks between `min` and `max`;
samplers wait while two shards for each scorer are unscored. A worker loads its model at its first
shard.

**What every node needs.** BoNBoN with its extras, the same versions of Python and Ray; the run's
folder, or `storage`, under the same path; and the model. Workers change to the folder that the
command was started in, where the node has it (a shared file system). Relative paths and the user's
modules (reward functions) then work as without Ray; elsewhere such modules must be installed, or
sent by `ray job submit --working-dir`. Keys are read from each node's environment and never sent.
A cluster must have room for the `min` workers at the start. Unless OMP_NUM_THREADS is set, a worker
on CPUs has as many threads as its `num_cpus`.

A cluster on this machine (no `address`) is started for the command and ended with it. Ray listens
on all of the machine's addresses, so it gets a token and refuses clients without it. This does not
work where the calling program has imported Ray before; set RAY_AUTH_MODE and RAY_AUTH_TOKEN there.

**What a failure costs.** A worker, an actor or a node that dies loses the shards it was working on:
Ray restarts the worker, on another node if necessary, and gives it the same shard. A prompt that
repeatedly kills its worker or makes the stage raise is set aside after `tries` tries, in
`dead_letters.jsonl` beside the shards. Its shard is written without it, and the run continues.
The same command resumes a killed run.

**How the failing prompt is identified.** Processes die, so tries are counted outside them: each
try writes a marker under `.bonbon/attempts/` before it starts and removes it at its end.

- The first try is of the whole shard. When it fails, the prompt at fault is unknown, so the
  shard's prompts are tried one by one, those with the fewest failures first. Results are kept.
- A prompt is set aside once it has failed `tries` times, the try of the whole shard included, and
  at least once alone. Other prompts of its shard are set aside only if they fail alone too.
- A try that ended because its node died is not counted, up to `tries` times a prompt and a shard.
  A process's death is counted, since the prompt may have caused it.
- When the first five prompts of a shard (all of a smaller one) fail, alone too, the prompts are
  not at fault: the run ends with the reason and sets none of them aside. It also ends when a server
  cannot be reached, when more than `max_dead_letters` prompts are set aside, and when loading a
  model or reading and writing shards fails. Each start of the command counts from zero, and prompts
  whose shard was not finished without them are tried again.
- After an exception that is not BoNBoN's own, or comes from torch or vLLM, a worker's process is
  replaced, since its engine may be broken.

**Trying again.** Prompts set aside are not tried again. To retry them, delete their lines in
`dead_letters.jsonl`, the files that the lines name under `shards`, and the notes
`.bonbon/sample.done.json` and `.bonbon/score.done.json` of the run; the same command then makes
these shards again.
"""
