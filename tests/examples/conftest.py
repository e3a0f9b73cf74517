import sys
from pathlib import Path

# The example is imported as a module, too.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
