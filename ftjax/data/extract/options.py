"""What can be chosen of extraction."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ftjax import __version__
from ftjax.errors import UserError


@dataclass(frozen=True)
class ExtractOptions:
    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    max_tokens: int = 1500
    """Of a section, by an estimate that errs on the long side."""
    min_tokens: int = 32
    """A section of fewer goes with the next one under the same heading."""
    license: str | None = None
    """Of the documents, for each section's meta; otherwise what a page or its front matter says."""
    base_url: str | None = None
    """Where a folder's files are published: their address is this and their path in the folder."""
    links: bool = False
    """Keep where links lead to, not only their text."""
    outputs: bool = False
    """Keep what notebooks' cells wrote as text."""
    include: list[str] = field(default_factory=list)
    """Patterns (guide/*.html) of which a path in a folder or address has to match one."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of which it may match none."""
    max_mb: float = 50.0
    """Larger files and pages are not read."""
    scope: Literal["page", "folder", "site"] = "folder"
    """How far links of an address are followed: not at all, below its folder, or in its whole site."""
    max_pages: int = 1000
    """Pages fetched for one address or sitemap."""
    max_depth: int = 20
    """Links from the address to a page."""
    rate: float = 1.0
    """Requests a second to one host (0: no limit); robots.txt may ask for fewer."""
    robots: bool = True
    """Heed robots.txt."""
    retries: int = 4
    """After 429, 5xx and no answer, after 1, 2, 4 … seconds or what Retry-After says."""
    timeout: float = 30.0
    """Seconds for one request."""
    user_agent: str = f"ftjax/{__version__}"
    """How we introduce ourselves; its first word is looked for in robots.txt."""
    cache: str | None = None
    """Folder of fetched pages (default: ~/.cache/ftjax/pages)."""
    fresh_hours: float = 24.0
    """For how long a cached page is used before it is asked whether it has changed."""
    knowledgesdk_url: str = "https://api.knowledgesdk.com"
    """The service that sources named knowledgesdk:URL and knowledgesdk+site:URL are fetched by."""

    def __post_init__(self):
        if self.max_tokens < 50:
            raise UserError(f"max_tokens={self.max_tokens}: 50 at least")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UserError(f"min_tokens={self.min_tokens}: from 0 to max_tokens={self.max_tokens}")
        for name in ("rate", "retries", "max_depth", "fresh_hours"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: 0 or more")
        for name in ("max_pages", "timeout", "max_mb"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: more than 0")
        if not self.user_agent.strip() or "\n" in self.user_agent:
            raise UserError(f"user_agent={self.user_agent!r}: a name, e.g. my-company-docs/1.0")
