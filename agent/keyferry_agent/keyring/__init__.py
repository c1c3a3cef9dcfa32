"""The keyring: master keys with their versions, states and aliases; in a sealed file, and in the daemon's secret memory.

    document     the content of the file, as data, with its checks    sealing   age: sealing, and the secrets that unseal
    file         reading, and atomic changes under a lock             edits     changes to a document
    recipients   parsing of age and SSH recipients                    loader    file -> pipe -> secret memory
    keyring      the daemon's keyring: look-ups and lending           changes   the log of changes
    fdstore      keys that survive a restart of the agent

Key material is in a document only in the short-lived processes of the command line and of the loader; the daemon never
has a document.
"""
