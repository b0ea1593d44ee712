"""Speed on a GPU, against all alternatives, in one run: `python -m benchmarks --gpu`.

run.py        the command: what runs, in which order, what is written
model.py      the transformer layer that is timed, its inputs and its FLOPs
cases.py      the contenders
worker.py     one case in its own process; workers.py is the command's side of it
timing.py     clocks, and interleaved rounds
layer.py, gemm.py, bandwidth.py   the three sections
devices.py    which device this is, its peaks, which versions run
bars.py       the requirements that figures must meet
report.py     JSON and Markdown
"""
