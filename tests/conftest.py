from __future__ import annotations

import os

# Read when the libraries are imported: no test asks a hub, and none waits for one that cannot be reached.
os.environ["HF_HUB_OFFLINE"] = "1"
