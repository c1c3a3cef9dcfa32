/* A PKCS#11 library that answers what a test wants to see, for answers that no token on a test machine gives.
 *
 *     ODD_FUNCTION_LIST, ODD_INITIALIZE, ODD_LOGIN   what C_GetFunctionList, C_Initialize and C_Login return, in decimal; 0 by default
 *     ODD_TOKENS    a slot a line: ID|return value of C_GetTokenInfo|flags|serial number|label. The texts are copied as they are,
 *                   and padded with spaces. A slot whose return value is 224 (CKR_TOKEN_NOT_PRESENT) is an empty one
 *
 * Every other function returns CKR_FUNCTION_NOT_SUPPORTED.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long rv;
typedef unsigned long ulong;
typedef rv (*function)(void);

enum { FUNCTIONS = 68, MOST = 8, NOT_PRESENT = 0xe0, UNSUPPORTED = 0x54, SLOT_INVALID = 3 };

struct version { unsigned char major, minor; };
struct slot_info { char description[64], manufacturer[32]; ulong flags; struct version hardware, firmware; };
struct token_info {
    char label[32], manufacturer[32], model[16], serial[16];
    ulong flags, counts[10];
    struct version hardware, firmware;
    char time[16];
};
struct session_info { ulong slot, state, flags, error; };
struct token { ulong slot, returned, flags; char serial[17], label[33]; };

static ulong number(const char *name) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : 0;
}

static void pad(char *to, size_t size, const char *text) {
    memset(to, ' ', size);
    memcpy(to, text, strnlen(text, size));
}

static int tokens(struct token *to) {
    const char *line = getenv("ODD_TOKENS");
    int count = 0;
    while (line && *line && count < MOST) {
        struct token *next = &to[count++];
        char *at;
        memset(next, 0, sizeof *next);
        next->slot = strtoul(line, &at, 10);
        next->returned = strtoul(at + 1, &at, 10);
        next->flags = strtoul(at + 1, &at, 10);
        const char *serial = at + 1, *label = strchr(serial, '|') + 1, *end = strchrnul(label, '\n');
        memcpy(next->serial, serial, (size_t)(label - 1 - serial));
        memcpy(next->label, label, (size_t)(end - label));
        line = *end ? end + 1 : end;
    }
    return count;
}

static rv initialize(void *arguments) { (void)arguments; return number("ODD_INITIALIZE"); }
static rv good(void) { return 0; }
static rv unsupported(void) { return UNSUPPORTED; }
static rv login(ulong session, ulong user, void *pin, ulong size) {
    (void)session, (void)user, (void)pin, (void)size;
    return number("ODD_LOGIN");
}

static rv get_slot_list(unsigned char present, ulong *slots, ulong *count) {
    struct token all[MOST];
    ulong found = 0;
    for (int i = 0, n = tokens(all); i < n; i++) {
        if (present && all[i].returned == NOT_PRESENT) continue;
        if (slots) slots[found] = all[i].slot;
        found++;
    }
    *count = found;
    return 0;
}

static rv get_slot_info(ulong slot, struct slot_info *info) {
    (void)slot;
    memset(info, 0, sizeof *info);
    pad(info->description, sizeof info->description, "odd slot");
    pad(info->manufacturer, sizeof info->manufacturer, "odd");
    return 0;
}

static rv get_token_info(ulong slot, struct token_info *info) {
    struct token all[MOST];
    for (int i = 0, n = tokens(all); i < n; i++) {
        if (all[i].slot != slot) continue;
        if (all[i].returned) return all[i].returned;
        memset(info, 0, sizeof *info);
        pad(info->label, sizeof info->label, all[i].label);
        pad(info->manufacturer, sizeof info->manufacturer, "odd maker");
        pad(info->model, sizeof info->model, "odd model");
        pad(info->serial, sizeof info->serial, all[i].serial);
        info->flags = all[i].flags;
        return 0;
    }
    return SLOT_INVALID;
}

static rv open_session(ulong slot, ulong flags, void *application, void *notify, ulong *session) {
    (void)flags, (void)application, (void)notify;
    *session = 1000 + slot;
    return 0;
}

static rv get_session_info(ulong session, struct session_info *info) {
    memset(info, 0, sizeof *info);
    info->slot = session - 1000;
    return 0;
}

static rv find_objects(ulong session, ulong *objects, ulong most, ulong *count) {
    (void)session, (void)objects, (void)most;
    *count = 0;
    return 0;
}

static struct { struct version version; function functions[FUNCTIONS]; } list;

rv C_GetFunctionList(void *to) {
    for (int i = 0; i < FUNCTIONS; i++) list.functions[i] = unsupported;
    list.version.major = 2, list.version.minor = 40;
    list.functions[0] = (function)initialize;
    list.functions[1] = good; /* C_Finalize */
    list.functions[4] = (function)get_slot_list;
    list.functions[5] = (function)get_slot_info;
    list.functions[6] = (function)get_token_info;
    list.functions[12] = (function)open_session;
    list.functions[13] = good; /* C_CloseSession */
    list.functions[15] = (function)get_session_info;
    list.functions[18] = (function)login;
    list.functions[26] = list.functions[28] = good; /* C_FindObjectsInit, C_FindObjectsFinal */
    list.functions[27] = (function)find_objects;
    *(void **)to = number("ODD_FUNCTION_LIST") ? NULL : &list;
    return number("ODD_FUNCTION_LIST");
}
