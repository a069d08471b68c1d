"""Sampling and scoring by Ray's workers: `engine: ray`.

**How it works.** One Ray Data pipeline reads shard numbers, samples, scores and writes. Only
numbers flow through Ray: a worker reads its shard from the run's storage, does with it what a run
without Ray does (`runs.shard_work`), and writes it back, whole or not at all. Sampling and
scoring overlap, each by a pool of workers that grows and shrinks between `min` and `max`; samplers
wait while two shards for each scorer lie unscored. A worker loads its model at its first shard.

**What every node needs.** BoNBoN with its extras, the same versions of Python and Ray; the run's
folder, or `storage`, under the same path; and the model. Workers go to the folder that the command
was started in, where the node has it (a shared file system), so that relative paths and modules of
the user's own (reward functions) are found as without Ray; elsewhere such modules must be
installed, or sent by `ray job submit --working-dir`. Keys are read from each node's environment and
never sent. A cluster must have room for the `min` workers at the start. Unless OMP_NUM_THREADS is
set, a worker on CPUs has as many threads as its `num_cpus`.

A cluster on this machine (no `address`) is started for the command and ended with it. Ray listens
on all of the machine's addresses, so it is given a token of its own, and refuses whoever lacks it
(not where the calling program has imported Ray before; set RAY_AUTH_MODE and RAY_AUTH_TOKEN then).

**What a failure costs.** A worker, an actor or a node that dies costs the shards it was at work on:
Ray starts the worker again, elsewhere if need be, and hands it the same shard. A prompt that kills
its worker or makes the stage raise, time and again, is set aside after `tries` tries into
`dead_letters.jsonl` beside the shards, and the run goes on; its shard is written without it.
A killed command is gone on with by the same command.

**How blame is found.** Since processes die, tries are counted outside them: each leaves a marker
under `.bonbon/attempts/` before it begins, which its end removes.

- The first try is that of the whole shard. When it fails, nobody knows which prompt it was, so
  its prompts are tried one by one, those with the fewest failures first; what is finished is kept.
- A prompt is set aside once it has failed `tries` times, the try of the whole shard included, and
  at least once alone. Others of its shard are set aside only if they fail alone too.
- A try that ended because its node died is forgiven, `tries` times a prompt and a shard; a
  process's death is not, since it cannot be told from one that the prompt caused.
- When the first five prompts of a shard (all of a smaller one) fail, alone too, the fault is not
  theirs: the run ends with the reason and sets none of them aside. So it does when a server cannot
  be reached, when more than `max_dead_letters` prompts are set aside, and when loading a model or
  reading and writing shards fails. Counting begins anew with each start of the command, and prompts
  whose shard was not finished without them are tried again.
- After an exception that is not BoNBoN's own, or comes from torch or vLLM, a worker's process is
  replaced, since its engine may be broken.

**Trying again.** Prompts set aside are not tried again. To do so, delete their lines in
`dead_letters.jsonl`, the files that the lines name under `shards`, and the notes
`.bonbon/sample.done.json` and `.bonbon/score.done.json` of the run; the same command then makes
these shards anew.
"""
