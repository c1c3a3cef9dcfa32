"""The keyring: master keys with their versions, states and aliases; in a sealed file, and in the daemon's secret memory.

    document   what the file says, as data, with its checks          sealing   age: who can open the file
    file       reading and atomic, exclusive changing                 verbs     changes to a document
    command    `keyferry-agent keyring ...`                           access    its verbs about what opens a keyring
    shown      what the verbs print                                   loader    file -> pipe -> secret memory
    loaded     the daemon's keyring: look-ups and lending            changes   the log of changes; history prints it

Key material is in a document only in the short-lived processes of the command line and of the loader; the daemon never
has a document.
"""
