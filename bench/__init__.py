"""Measurements: how fast the kernels are beside others (`python -m bench`), how settings were chosen, what came out.

    python -m bench [kernels|train|infer|growth|all] [--device cuda] [--quick] [--rows TEXT] [--without NAME]
                    [--json FILE] [--threads N]

`kernels` times every operation, forward and backward, `train` one training step of each network, the peak memory of a
fresh process and its way to the first step, with kernels to compile and without, `infer` a batch of windows and whole
utterances from samples to label; `growth` our own times against the networks' width, the windows of an utterance and
the number of threads; `all`, the default, everything, our times against the batch, too. `--quick` shows a few rows at
batch 32 in about a minute, without torch.compile.
What is compared must be installed: pip install 'npser[bench]'; the rest is named as absent. torch.compile needs a C++
compiler. Whole utterances are of the built-in corpus; the whole corpus is EMO-DB where NPSER_DATA says where it lies,
else the built-in one. `--json` writes every round's median of every candidate, row by row, also of a run that was
interrupted.

How it measures:
- Every candidate lives in a process of its own (worker.py), all on the same cores with the same number of threads. One
  runs at a time, and a pause before each lets the thread pool of the one before fall asleep.
- Every result is compared with `kernels.reference` before anything is timed; a candidate that is wrong is reported
  and not timed, and the exit status is 1. Whole networks are compared at the paper's size: the probabilities of a few
  windows, the losses and the change of every parameter in two training steps of two windows without dropout.
- Every process keeps the memory that it frees for the next array (`npser.cli.keep_memory`, as the project's commands
  do): PyTorch's large batches gain by it, too. Peak memory is measured without, but for ours.
- Each framework is given its best form that we know of: PyTorch its fused SGD beside the plain loop, JAX a max-pooling
  whose backward pass is faster than the customary one and its fastest random generator. Weights stand in its own
  order before the clock runs.
- A round runs every candidate in turn, once untimed and then for some time; the next round begins with another one.
  A candidate's time is the median over the rounds of its median in each.
- `ratio` is the time of the fastest peer over ours: above 1 we are faster. In brackets the quartiles of the ratios of
  the single rounds.
- GFLOP/s counts the operations of the dense definition (2 for a multiplication and an addition), whatever a kernel
  saves of them; GB/s counts every operand and result once.
- `peak` is the share of what the machine could do: the larger of operations over the measured peak of multiply-adds
  (f) and bytes over the measured memory bandwidth (m), over our time. Skipped operations, or operands that stay in the
  caches, can raise it above 100 %.

On a GPU (`--device cuda`; not on Numba's simulator):
- Columns are npser in float32 and TF32, PyTorch (cuDNN, cuBLAS) eager, channels last, as one CUDA graph and compiled
  with TF32 off, eager and as a graph with TF32 on, and JAX with both. Only `kernels` without the Fourier transform,
  `train` and `infer` of windows are timed; peak memory, starts, utterances and growth are not.
- `ratio` compares float32 with float32: columns in TF32, ours among them, are for the reader to compare.
- Operands are on the device before the clock runs, and results stay there. A time is the mean of as many repetitions as
  last 20 ms, by events before the first and behind the last of them; for JAX, which has none, by the clock on the host.
- The peaks are measured: multiply-adds of registers by a kernel of ours, bytes read and written by a copy.
- Results in TF32 may be 50 times as far from the reference as those in float32. A CUDA graph is checked as the step
  that was captured.

Reading the code: workloads.py says what is computed, peers/ how each candidate computes it, race.py how candidates take
turns, machine.py and gpu.py what the machine can do, suites.py which rows there are, tables.py what is printed. A new
operation is a kind in workloads.py, a function of that name in the modules of peers/, and a row in suites.py.

The others are of another kind: develop.py tries settings on development data; leakage.py and nested.py are experiments
with whole cross-validations, on the options of protocol.py; publish.py makes the README's tables of finished folds, and
again.py computes one of them once more; gpu_check.py does on a GPU what can be done nowhere else.

Nothing here is imported by npser or kernels.
"""
