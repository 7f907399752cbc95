"""Python stands above a clone that is called vgen: this hands over to the package inside.

Without it the folder of the clone would be an empty namespace called vgen, which hides an editable install of the same name. A wheel
does not have this file.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "vgen":
    _root = Path(__file__).resolve().parent
    # The folder of the clone is the second place: kernels/, samplers/ and tokenizers_vis/ are subpackages of vgen.
    _places = [str(_root / "vgen"), str(_root)]
    _spec = spec_from_file_location(__name__, _root / "vgen" / "__init__.py", submodule_search_locations=_places)
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
