"""Every limit that the server sets to a client; docs/security.md lists them, and a test compares."""

from __future__ import annotations

# Connections
MAX_CONNECTIONS = 512  # open at a time; for one more, that on which the server waits longest for its client is closed
MAX_HEADER_BYTES = 64 << 10
MAX_EARLY_BYTES = 64 << 10  # of further requests that come before the answer to the first
HEADER_S = 10.0  # from the first byte of a request, or the connection, to the end of its header
KEEP_ALIVE_S = 5.0  # between the end of an answer and the first byte of the next request
BODY_S = 30.0  # from the end of the header to the end of the body
DRAIN_S = 5.0  # for the rest of a body that has got its answer already
WRITE_S = 30.0  # without a moment at which the client had read all that was sent

# Bodies
MAX_BODY_BYTES = 16 << 20
MAX_BODIES_BYTES = 64 << 20  # of all that are being read or wait to be tokenised
SMALL_BODY_BYTES = 64 << 10  # that each may have beside those: small requests pass where large ones are refused
MAX_DEPTH = 64  # of arrays and objects in one another
MAX_CONTAINERS = 1 << 16  # arrays and objects of a body
MAX_VALUES = 1 << 20  # values of a body

# Prompts
MAX_CHARS_PER_TOKEN = 32  # of the context; a longer text is refused untokenised: none with a meaning would fit
MAX_LONG_PROMPTS = 8  # that are tokenised, one at a time, or wait for it
LONG_CHARS = 64 << 10  # from which on a prompt is one of those
LONG_TURNS = 256
