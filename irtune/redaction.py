"""What a configuration may not hold, and what a folder may not decide.

Passwords and tokens have no place in a configuration: it is saved, logged and shown in TensorBoard.

The hub's own places for a login are the environment variable HF_TOKEN and the file that `hf auth login` writes. irtune
reads neither: the hub's client does.
"""

import re
from typing import Any

HIDDEN = "***"
# What is hidden is the group `secret`: the name of a user or of a query's key may be shown.
_SHAPES = (
    r":/{1,2}[^/\s:@'\"]*:(?P<secret>[^/\s@'\"]+)@",  # https://user:password@host; a Path has one slash of it
    r":/{1,2}(?P<secret>[^/\s:@'\"]+)@",  # https://token@host
    r"[?&](?:access_|auth_|api_)?(?:token|key|password|passwd|secret|sig|signature)=(?P<secret>[^&#\s'\"]+)",
    # With a digit or a capital in it: hf_transformersmodels may be a folder.
    r"(?<![A-Za-z0-9])(?P<secret>(?:hf|gh[opsu]|api_org)_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,})",
    r"(?<![A-Za-z0-9])(?P<secret>(?:github_pat_|glpat-|xox[abps]-)[A-Za-z0-9_-]{16,})",
    r"\b(?P<secret>sk-[A-Za-z0-9_-]{20,})",
    r"\b(?P<secret>AKIA[0-9A-Z]{16})\b",
    r"\bBearer\s+(?P<secret>[A-Za-z0-9._~+/-]{8,}=*)",
)
_PATTERNS = tuple(re.compile(shape, re.IGNORECASE if "Bearer" in shape or "[?&]" in shape else 0) for shape in _SHAPES)


def redact(text: str) -> str:
    """`text` with what looks like a password or a token replaced by ***."""
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span("secret"))
    return match[0][:start] + HIDDEN + match[0][end:]


def without_secrets(value: Any) -> Any:
    """Lists and maps of plain values, every text in them redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value
