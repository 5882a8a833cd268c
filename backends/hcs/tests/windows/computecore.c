/* A stand-in for computecore.dll: the functions that blockmount-hcs calls, with real handles, and
 * operations that end later, on threads of their own. What a request does is decided by a function of the test, its
 * brain. Documents are also appended to the file that HCS_STAND_IN_LOG names, a line each. */
#include <windows.h>

#define EXPORT __declspec(dllexport)

typedef void(WINAPI *Completion)(void *operation, void *context);
typedef LONG(WINAPI *Brain)(const WCHAR *system, DWORD what, const WCHAR *document, WCHAR *answer, DWORD capacity);

enum { OPEN, START, MODIFY, PROPERTIES, GRANT, GRANT_GROUP };
enum { NEW, RUNNING, DONE, CANCELLED };

#define NEVER 0x7fffffff
#define OPERATION_NOT_STARTED ((LONG)0x80370115)
#define OPERATION_ALREADY_STARTED ((LONG)0x80370116)
#define OPERATION_PENDING ((LONG)0x80370117)
#define CAPACITY 8192

struct system {
    WCHAR *id;
};

struct operation {
    LONG references; /* the handle, and the thread that works on it */
    SRWLOCK lock;
    int state;
    Completion callback;
    void *context;
    DWORD what;
    WCHAR *id, *request, *document;
    LONG result;
};

static Brain brain;
static LONG handles, cancelled;
static SRWLOCK log_lock = SRWLOCK_INIT;

EXPORT void WINAPI StandInServe(Brain function) { brain = function; }
EXPORT LONG WINAPI StandInOpenHandles(void) { return InterlockedCompareExchange(&handles, 0, 0); }
EXPORT LONG WINAPI StandInCancelled(void) { return InterlockedCompareExchange(&cancelled, 0, 0); }

/* Strings are made as the service makes those that its callers free. */
static WCHAR *copy(const WCHAR *text) {
    SIZE_T size = (lstrlenW(text) + 1) * sizeof(WCHAR);
    WCHAR *made = LocalAlloc(LMEM_FIXED, size);
    if (made) CopyMemory(made, text, size);
    return made;
}

static LONG ask(const WCHAR *system, DWORD what, const WCHAR *document, WCHAR *answer) {
    answer[0] = 0;
    return brain ? brain(system, what, document, answer, CAPACITY) : E_UNEXPECTED;
}

static LONG ask_now(const WCHAR *system, DWORD what, const WCHAR *document) {
    WCHAR answer[CAPACITY];
    return ask(system, what, document, answer);
}

static void append_to_log(const WCHAR *document) {
    WCHAR path[MAX_PATH];
    char line[3 * CAPACITY];
    DWORD written, length = GetEnvironmentVariableW(L"HCS_STAND_IN_LOG", path, MAX_PATH);
    if (length == 0 || length >= MAX_PATH) return;
    int size = WideCharToMultiByte(CP_UTF8, 0, document, -1, line, sizeof(line), NULL, NULL);
    if (size == 0) return;
    line[size - 1] = '\n';
    AcquireSRWLockExclusive(&log_lock);
    HANDLE file = CreateFileW(path, FILE_APPEND_DATA, FILE_SHARE_READ, NULL, OPEN_ALWAYS, 0, NULL);
    if (file != INVALID_HANDLE_VALUE) {
        WriteFile(file, line, size, &written, NULL);
        CloseHandle(file);
    }
    ReleaseSRWLockExclusive(&log_lock);
}

EXPORT LONG WINAPI HcsOpenComputeSystem(const WCHAR *id, DWORD access, void **handle) {
    *handle = NULL;
    if (access != GENERIC_ALL) return E_ACCESSDENIED;
    LONG result = ask_now(id, OPEN, NULL);
    if (result < 0) return result;
    struct system *system = LocalAlloc(LPTR, sizeof(*system));
    system->id = copy(id);
    InterlockedIncrement(&handles);
    *handle = system;
    return S_OK;
}

EXPORT void WINAPI HcsCloseComputeSystem(void *handle) {
    struct system *system = handle;
    LocalFree(system->id);
    LocalFree(system);
    InterlockedDecrement(&handles);
}

static void release(struct operation *operation) {
    if (InterlockedDecrement(&operation->references)) return;
    LocalFree(operation->id);
    LocalFree(operation->request);
    LocalFree(operation->document);
    LocalFree(operation);
}

EXPORT void *WINAPI HcsCreateOperation(void *context, Completion callback) {
    struct operation *operation = LocalAlloc(LPTR, sizeof(*operation));
    operation->references = 1;
    InitializeSRWLock(&operation->lock);
    operation->callback = callback;
    operation->context = context;
    InterlockedIncrement(&handles);
    return operation;
}

EXPORT LONG WINAPI HcsCancelOperation(void *handle) {
    struct operation *operation = handle;
    AcquireSRWLockExclusive(&operation->lock);
    if (operation->state == RUNNING) {
        operation->state = CANCELLED;
        InterlockedIncrement(&cancelled);
    }
    ReleaseSRWLockExclusive(&operation->lock);
    return S_OK;
}

EXPORT void WINAPI HcsCloseOperation(void *handle) {
    HcsCancelOperation(handle);
    release(handle);
    InterlockedDecrement(&handles);
}

EXPORT LONG WINAPI HcsGetOperationResult(void *handle, WCHAR **document) {
    struct operation *operation = handle;
    LONG result;
    *document = NULL;
    AcquireSRWLockShared(&operation->lock);
    switch (operation->state) {
    case NEW: result = OPERATION_NOT_STARTED; break;
    case RUNNING: result = OPERATION_PENDING; break;
    case CANCELLED: result = E_ABORT; break;
    default:
        result = operation->result;
        if (operation->document) *document = copy(operation->document);
    }
    ReleaseSRWLockShared(&operation->lock);
    return result;
}

static DWORD WINAPI work(void *parameter) {
    struct operation *operation = parameter;
    WCHAR answer[CAPACITY];
    LONG result = ask(operation->id, operation->what, operation->request, answer);
    BOOL ends = FALSE;
    if (result != NEVER) {
        AcquireSRWLockExclusive(&operation->lock);
        if (operation->state == RUNNING) {
            operation->state = DONE;
            operation->result = result;
            operation->document = answer[0] ? copy(answer) : NULL;
            ends = TRUE;
        }
        ReleaseSRWLockExclusive(&operation->lock);
    }
    if (ends && operation->callback) operation->callback(operation, operation->context);
    release(operation);
    return 0;
}

static LONG start(struct system *system, struct operation *operation, DWORD what, const WCHAR *request) {
    if (operation->state != NEW) return OPERATION_ALREADY_STARTED;
    LONG result = ask_now(system->id, START, request);
    if (result < 0) return result;
    operation->state = RUNNING;
    operation->what = what;
    operation->id = copy(system->id);
    operation->request = copy(request);
    InterlockedIncrement(&operation->references);
    HANDLE thread = CreateThread(NULL, 0, work, operation, 0, NULL);
    if (!thread) {
        release(operation);
        return E_OUTOFMEMORY;
    }
    CloseHandle(thread);
    return S_OK;
}

EXPORT LONG WINAPI HcsModifyComputeSystem(void *system, void *operation, const WCHAR *document, HANDLE identity) {
    if (identity) return E_INVALIDARG;
    append_to_log(document);
    return start(system, operation, MODIFY, document);
}

EXPORT LONG WINAPI HcsGetComputeSystemProperties(void *system, void *operation, const WCHAR *query) {
    return start(system, operation, PROPERTIES, query);
}

EXPORT LONG WINAPI HcsGrantVmAccess(const WCHAR *vm, const WCHAR *path) { return ask_now(vm, GRANT, path); }

EXPORT LONG WINAPI HcsGrantVmGroupAccess(const WCHAR *path) { return ask_now(NULL, GRANT_GROUP, path); }
