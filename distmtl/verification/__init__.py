"""The parity gate: train the same few steps in several ways and compare; export, and compare. Run it on your own config before a big run.

Everything is computed on this machine's CPU by forked ranks, on the first rows of the config's own training data, dropout off.

runs (training, seen by a rank) → reference (the same steps in plain PyTorch) → gate (every comparison)
"""
