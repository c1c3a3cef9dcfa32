"""Data-key records in SQLite or PostgreSQL: the backup from which data keys are recovered. Needs the extra `store`.

    with Store() as store, Client() as kms:
        store.add(new_record(kms, "orders", key_id="alias/orders", encryption_context={"tenant": "acme"}))
        key = module.recover_data_key(kms, store.get("orders").data_key_record())

`rewrap` moves every record to its master key's primary version; `copy` copies records to another store.
docs/records.md describes the store for operators.
"""

from .record import Record, StoreError, new_record
from .renew import renew
from .rewrap import Outcome, rewrap
from .store import Store, schema
from .transfer import Copied, copy

__all__ = ["Copied", "Outcome", "Record", "Store", "StoreError", "copy", "new_record", "renew", "rewrap", "schema"]
