import sys
from pathlib import Path

# The example's modules find each other as they do when it is run as a script.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
