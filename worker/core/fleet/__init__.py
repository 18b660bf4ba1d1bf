"""The processes that share one gateway as one client: who leads them, and what the leader decides for all.

`member` is one process: it hears what happens and says what is to be done. It is made of `terms` (who leads),
`permits` (the rate limit) and `messages` (what the members say to each other). Time is passed in; nothing here waits.
"""
