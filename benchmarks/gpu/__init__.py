"""Speed on a GPU, against everything one could use instead, in one run: `python -m benchmarks --gpu`.

run.py        the command: who runs, in which order, what is written
model.py      the transformer layer that is timed, its inputs and its FLOPs
cases.py      who is measured
worker.py     one case in a process of its own; the command's side of it is workers.py
timing.py     clocks, and rounds in which all take their turn
layer.py, gemm.py, bandwidth.py   the three sections
devices.py    which device this is, what it could reach, which versions run
bars.py       what the figures are held to
report.py     JSON and Markdown
"""
