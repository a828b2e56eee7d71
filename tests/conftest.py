"""For all tests."""

import signal

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start inherits
# that: Python then installs no handler, and the tests of Ctrl-C would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
