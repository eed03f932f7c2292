"""What tokens and keys of common services look like, as data: one pattern for each format that its
issuer documents. To add a service, add a row.

The rules of detect-secrets 1.5.0 are not used: of 32 formats that recipes and profiles may hold,
they know 17, and neither Hugging Face's, OpenAI's, Google's and NVIDIA's nor GitHub's newer ones;
these patterns know all 32. They also take 1.4 s to import, which `pocl --help` would wait for, and
find whole lines, where a log needs to know which characters to hide.
"""

from __future__ import annotations

import re

# A token's characters after its prefix: URL-safe base64.
_WORD = r"[A-Za-z0-9_-]"

TOKEN_FORMATS: dict[str, str] = {
    "Hugging Face": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "OpenAI, Anthropic and others": rf"\bsk-{_WORD}{{20,}}",
    "GitHub": r"\bgh[a-z]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "GitLab": rf"\bgl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-{_WORD}{{20,}}",
    "AWS": r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",
    "Google": rf"\bAIza{_WORD}{{35}}|\bGOCSPX-{_WORD}{{20,}}|\bya29\.{_WORD}{{20,}}",
    "Azure": r"\bAccountKey=[A-Za-z0-9+/]{40,}={0,2}",
    "Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bxapp-[A-Za-z0-9-]{20,}",
    "NVIDIA": rf"\bnvapi-{_WORD}{{20,}}",
    "Groq, xAI, Replicate": r"\b(?:gsk_|xai-|r8_)[A-Za-z0-9]{30,}",
    "Stripe": r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "PyPI and npm": rf"\bpypi-{_WORD}{{40,}}|\bnpm_[A-Za-z0-9]{{36}}",
    "Databricks": r"\bdapi[a-f0-9]{32}",
    "SendGrid": rf"\bSG\.{_WORD}{{16,}}\.{_WORD}{{16,}}",
    "Discord": rf"\b[MNO]{_WORD}{{22,27}}\.{_WORD}{{6}}\.{_WORD}{{27,40}}",
    "Telegram": rf"\b[0-9]{{8,10}}:AA{_WORD}{{33}}",
    "Twilio": r"\bSK[a-f0-9]{32}\b",
    "Mailchimp": r"\b[a-f0-9]{32}-us[0-9]{1,2}\b",
    "Square": rf"\bsq0[a-z]{{3}}-{_WORD}{{22,}}",
    "Artifactory": r"\bAKCp[A-Za-z0-9]{50,}",
    "JSON Web Token": rf"\beyJ{_WORD}{{8,}}\.eyJ{_WORD}{{8,}}\.{_WORD}*",
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----)?",
    # A digit tells a token from words, as in "basic understanding".
    "authorization header": r"(?i:\b(?:bearer|basic)\s+)(?=\S*[0-9])[A-Za-z0-9._~+/-]{16,}=*",
    "query of an address": r"(?i:(?<=[?&])(?:\w*key|\w*token|pass|password|secret|sig|signature)=)"
    r"[^&#\s'\"]+",
}
TOKEN = re.compile("|".join(f"(?:{pattern})" for pattern in TOKEN_FORMATS.values()), re.DOTALL)
