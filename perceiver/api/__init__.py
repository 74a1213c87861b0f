"""The Python interface `perceiver.NAME`: what the commands do, with return values and exceptions.

Each function is what the command of its name calls, or calls what that command calls.
"""

from perceiver.tracking import redaction as redaction  # errors show no secrets
