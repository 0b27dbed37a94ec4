"""robots.txt by RFC 9309: the longest rule that matches wins, * and $ in paths, allowed if nothing matches.

The standard library's urllib.robotparser takes the first rule that matches, and knows neither sign.
"""

import re
from urllib.parse import unquote, urlsplit


class Robots:
    """The rules for one user agent; `text` None: not to be had, so nothing is allowed."""

    def __init__(self, text: str | None, user_agent: str):
        self.known = text is not None
        self.delay = 0.0
        """Seconds between requests (Crawl-delay; not in the RFC, but what many sites say)."""
        self.sitemaps: list[str] = []
        self.rules: list[tuple[str, bool]] = []
        if text is None:
            return
        product = re.split(r"[/\s]", user_agent.strip().lower(), maxsplit=1)[0]
        groups: dict[str, list[tuple[str, str]]] = {}
        agents: list[str] = []
        named = False  # whether the last line was a user-agent line: several share a group
        for line in text.removeprefix("\ufeff").splitlines():
            key, colon, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            if not colon:
                continue
            if key == "user-agent":
                agents = [*agents, value.lower()] if named else [value.lower()]
                groups.setdefault(value.lower(), [])
            elif key == "sitemap":
                self.sitemaps.append(value)
                continue
            else:
                for agent in agents:
                    groups[agent].append((key, value))
            named = key == "user-agent"
        for key, value in groups.get(product, groups.get("*", [])):
            if key in ("allow", "disallow") and value:
                self.rules.append((value, key == "allow"))
            elif key == "crawl-delay" and re.fullmatch(r"\d+(\.\d+)?", value):
                self.delay = float(value)

    def allows(self, url: str) -> bool:
        if not self.known:
            return False
        parts = urlsplit(url)
        path = unquote(parts.path or "/") + (f"?{unquote(parts.query)}" if parts.query else "")
        if path == "/robots.txt":
            return True
        matching = [(len(rule), allowed) for rule, allowed in self.rules if _matches(unquote(rule), path)]
        return max(matching, default=(0, True))[1]


def _matches(rule: str, path: str) -> bool:
    end = "$" if rule.endswith("$") else ""
    pattern = ".*".join(re.escape(piece) for piece in rule.removesuffix("$").split("*"))
    return re.match(pattern + end, path, re.S) is not None
