"""The reference study: ``make experiments``. On a CPU, two processes of one thread.

    runs        what is pretrained, and what is studied of it
    pretrain    one run: a small real pretraining that leaves its checkpoints
    spoil       checkpoints that are damaged on purpose
    examine     one trajectory: its study, and the checks that a study does not make
    optimise    weights found by gradient descent on the merged model's loss
    targets     what the rules are held to, and whether they keep it
    results     results.md and results.json beside this file

Every run and every trajectory is kept in ``workspace/experiments`` once it is done.
"""
