"""This worker beside two others that do exactly the same job with the same guarantees: `python -m tests.benchmark`.

A run has four parts: a broker's objects of its own (`site`), a gateway in a process of its own (`gateway`), one
contender (`contenders`) and what the machine says meanwhile (`machine`). `measure` makes one run of them, `scenarios`
makes runs into tables. `pace` is a steady load (`publisher`) with its system calls (`calls`), `profile` says where the
time goes (`sampler`).
"""
