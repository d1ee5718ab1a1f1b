"""What is kept for tenants within one budget of memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


class TenantStore(Generic[Item]):
    """Items by tenant and name. Where they become too many, the tenant that has most loses its oldest. An item's size must
    not change while it is here."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: dict[str, OrderedDict[str, Item]] = {}
        self._sizes: Counter[str] = Counter()

    def keep(self, tenant: str, name: str, item: Item) -> None:
        self._items.setdefault(tenant, OrderedDict())[name] = item
        self._sizes[tenant] += item.num_bytes
        while self._sizes.total() > self._max_bytes:
            loser = max(self._sizes, key=self._sizes.__getitem__)
            self.discard(loser, next(iter(self._items[loser])))

    def find(self, tenant: str, name: str) -> Item | None:
        return self._items.get(tenant, OrderedDict()).get(name)

    def of(self, tenant: str) -> Iterator[tuple[str, Item]]:
        """A tenant's items by their names, the oldest first; they may be discarded meanwhile."""
        yield from list(self._items.get(tenant, OrderedDict()).items())

    def discard(self, tenant: str, name: str) -> None:
        """Forgets an item, if there is one."""
        item = self._items.get(tenant, OrderedDict()).pop(name, None)
        if item is not None:
            self._sizes[tenant] -= item.num_bytes
            if not self._items[tenant]:
                del self._items[tenant], self._sizes[tenant]
