"""The processes that share one gateway as one client: who leads them, and what the leader decides for all.

`member` is one process: it hears what happens and says what is to be done. It is made of what it knows of itself
(`own`), what it knows of its leader (`follower`) and what it decides when it leads (`leader`). Below are `terms` (who
leads), `permits` (the rate limit) and `messages` (what members say to each other). Time is passed in; nothing here
waits.
"""
