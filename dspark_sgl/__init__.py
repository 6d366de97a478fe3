"""DSpark speculative decoding for SGLang: drafters are plugins, verification is a policy.

This module gives the package its version and its parts. It never imports torch or SGLang: `dspark_sgl.policies`
must load in milliseconds on a machine that has neither.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout `spec_algos/`, `policies/`, `kernels/` and `policies_yaml/` lie beside this folder; a wheel puts
# them inside it. Searching the checkout's root as well makes `dspark_sgl.policies` the same name in both.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "policies_yaml").is_dir():
    __path__.append(str(_checkout))
