"""The one text of a label, however a file or a configuration writes it."""

import math
import re
from decimal import Decimal
from typing import Any

# A whole number as programs write it that know floats only: 12.0 (pandas, a column with a gap), 1e+05 (R).
_WHOLE_AS_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0*")
_SCIENTIFIC = re.compile(r"-?[0-9](\.[0-9]+)?[eE]\+[0-9]{2}")
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}


def canonical(value: Any) -> Any:
    """The one text of a whole number or a truth value, however a file writes it; other values as they are.

    1, 1.0, "1.0" and Decimal("1.00") are "1"; True, "TRUE" and "True" are "true". "01", "1.5" and "1e5" stay.
    """
    if isinstance(value, str):
        if value in _TRUTH:
            return _TRUTH[value]
        if "." not in value and "+" not in value:
            return value
        whole = _WHOLE_AS_FLOAT.fullmatch(value)
        if whole is not None:
            return "0" if whole[1] == "-0" else whole[1]
        if _SCIENTIFIC.fullmatch(value) is None:
            return value
        number = float(value)
        return str(int(number)) if number.is_integer() else value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return value
