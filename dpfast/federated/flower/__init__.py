"""All that touches Flower's inner parts: messages, and the engines that carry them.

`messages` is between our sites and Flower's records; `in_process`, `simulation` and `runtime` are
ways to bring them to the sites.
"""
