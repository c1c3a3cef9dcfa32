"""The mutated modules and their tests: each module with the test files for it, the quickest first."""

from typing import Final

AGENT, CLIENT = "agent/keyferry_agent", "client/keyferry"

MODULES: Final = {
    f"{AGENT}/authz/grants.py": ("test_grants",),
    f"{AGENT}/server/rate_limit.py": ("test_limits",),
    f"{AGENT}/authz/decision_cache.py": ("test_decision_cache", "test_remembered"),
    f"{AGENT}/server/dispatch.py": ("test_remembered", "test_fault_isolation"),
    f"{AGENT}/crypto/aad.py": ("test_ciphertext",),
    f"{AGENT}/crypto/ciphertext_blob.py": ("test_ciphertext", "test_wiping"),
    f"{AGENT}/crypto/public_key.py": ("test_public_key", "test_wycheproof"),
    f"{AGENT}/crypto/wrapping.py": ("test_public_key", "test_sm2"),
    f"{AGENT}/handlers/encryption.py": ("test_encrypt_decrypt_reencrypt", "test_key_states"),
    f"{AGENT}/handlers/export.py": ("test_remembered", "test_operations"),
    f"{AGENT}/handlers/data_keys.py": ("test_remembered", "test_operations"),
    f"{AGENT}/handlers/common.py": ("test_remembered", "test_operations", "test_key_states"),
    f"{AGENT}/keyring/document.py": ("test_remembered", "test_keyring", "test_keyring_edits"),
    f"{AGENT}/keyring/keyring.py": ("test_remembered", "test_key_states"),
    f"{AGENT}/chained_log/chain.py": ("test_audit", "test_audit_incomplete", "test_audit_rotated"),
    f"{AGENT}/chained_log/file.py": ("test_audit", "test_audit_incomplete"),
    f"{CLIENT}/protocol/wire.py": ("test_wire", "test_wiping"),
    f"{CLIENT}/protocol/msgpack_scanner.py": ("test_wire",),
    f"{CLIENT}/protocol/rpc.py": ("test_deadlines", "test_pipeline", "test_client"),
    f"{CLIENT}/client.py": ("test_deadlines", "test_pipeline", "test_client"),
    f"{CLIENT}/files/stream.py": ("test_files",),
    f"{CLIENT}/files/header.py": ("test_files",),
    f"{CLIENT}/files/output.py": ("test_durability", "test_places"),
}
"""The paths of modules, and names of test files."""
