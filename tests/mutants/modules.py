"""The mutated modules and their tests: each module with the test files for it, the quickest first."""

from typing import Final

AGENT, CLIENT = "agent/keyferry_agent", "client/keyferry"

MODULES: Final = {
    f"{AGENT}/authz/grants.py": ("test_grants",),
    f"{AGENT}/server/rate_limit.py": ("test_limits",),
    f"{AGENT}/authz/decision_cache.py": ("test_decision_cache", "test_remembered"),
    f"{AGENT}/server/dispatch.py": ("test_dispatch", "test_remembered", "test_fault_isolation"),
    f"{AGENT}/crypto/aad.py": ("test_ciphertext",),
    f"{AGENT}/crypto/ciphertext_blob.py": ("test_ciphertext", "test_wiping"),
    f"{AGENT}/crypto/public_key.py": ("test_public_key", "test_wycheproof"),
    f"{AGENT}/crypto/wrapping.py": ("test_public_key", "test_dispatch", "test_sm2", "test_openssl_configuration"),
    f"{AGENT}/handlers/encryption.py": ("test_dispatch", "test_encrypt_decrypt_reencrypt", "test_key_states"),
    f"{AGENT}/handlers/export.py": ("test_remembered", "test_operations", "test_sm2", "test_openssl_configuration"),
    f"{AGENT}/handlers/data_keys.py": (
        "test_remembered",
        "test_operations",
        "test_encrypt_decrypt_reencrypt",
        "test_granted_callers",
    ),
    f"{AGENT}/handlers/common.py": (
        "test_remembered",
        "test_operations",
        "test_encrypt_decrypt_reencrypt",
        "test_key_states",
    ),
    f"{AGENT}/keyring/document.py": ("test_remembered", "test_keyring", "test_keyring_edits", "test_disabled_versions"),
    f"{AGENT}/keyring/keyring.py": (
        "test_remembered",
        "test_key_states",
        "test_large_keyring",
        "test_unseal",
        "test_health",
    ),
    f"{AGENT}/chained_log/chain.py": (
        "test_audit",
        "test_audit_entries",
        "test_audit_incomplete",
        "test_audit_rotated",
    ),
    f"{AGENT}/chained_log/file.py": ("test_audit", "test_audit_entries", "test_audit_incomplete", "test_audit_journal"),
    f"{CLIENT}/protocol/wire.py": ("test_wire", "test_wiping"),
    f"{CLIENT}/protocol/fast_reader.py": ("test_wire",),
    f"{CLIENT}/protocol/msgpack_scanner.py": ("test_wire",),
    f"{CLIENT}/protocol/rpc.py": ("test_deadlines", "test_pipeline", "test_client", "test_logger"),
    f"{CLIENT}/client.py": ("test_deadlines", "test_pipeline", "test_client"),
    f"{CLIENT}/files/stream.py": ("test_files", "test_renewed_keys"),
    f"{CLIENT}/files/header.py": ("test_files",),
    f"{CLIENT}/files/atomic.py": ("test_durability", "test_places"),
}
"""The paths of modules, and names of test files."""
