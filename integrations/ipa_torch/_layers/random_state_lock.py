"""Lock of reads of torch's random state."""

from __future__ import annotations

import threading

#: Two threads that read the state at once may wait for each other without end: torch holds the
#: generator's mutex while it waits for the interpreter's lock.
RANDOM_STATE_LOCK = threading.RLock()
