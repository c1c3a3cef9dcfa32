"""Records of data keys in a database, SQLite or PostgreSQL: the backup that brings data keys back (extra `store`).

    with Store() as store, Client() as kms:
        store.add(new_record(kms, "orders", key_id="alias/orders", encryption_context={"tenant": "acme"}))
        key = module.recover_data_key(kms, store.get("orders").data_key_record())

`rewrap` moves all of them under their master keys' newest versions; `copy` copies them to another store.
docs/records.md has it for operators.
"""

from .record import Record, StoreError, new_record
from .renew import renew
from .rewrap import Outcome, rewrap
from .store import Store, schema
from .transfer import Copied, copy

__all__ = ["Copied", "Outcome", "Record", "Store", "StoreError", "copy", "new_record", "renew", "rewrap", "schema"]
