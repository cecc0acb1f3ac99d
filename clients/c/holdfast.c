/* Holdfast from C, with hiredis: `cc holdfast.c -lhiredis -o holdfast && ./holdfast 127.0.0.1 6380` after `make run`.
 *
 * With a third argument it is a client for tests: each line of the standard input is a command, its words in hexadecimal digits; the reply is
 * printed as JSON. `pipeline N` in place of it sends N times STOCK.GET in one go, `pool N` opens N connections and asks on each,
 * `subscribe channel` subscribes on a connection of its own and prints the first message. It logs in as $CLIENT_USER, if there is one. */

#include <hiredis/hiredis.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Sends a change with a REQUEST, again on a new connection where the old one is lost: there is one effect at most. The reply is the caller's
 * to free; NULL where nobody has answered, and then the same REQUEST may be asked again later. */
static redisReply *change(redisContext **connection, const char *command, const char *product, const char *quantity, const char *request) {
    for (int try = 0; try < 5; try++) {
        redisReply *reply = redisCommand(*connection, "%s %s %s REQUEST %s", command, product, quantity, request);
        if (reply == NULL) {
            if (redisReconnect(*connection) != REDIS_OK) return NULL;
            continue;
        }
        int again = reply->type == REDIS_REPLY_ERROR && (strncmp(reply->str, "LOADING ", 8) == 0 || strncmp(reply->str, "TRYAGAIN ", 9) == 0 ||
                                                         strncmp(reply->str, "INDOUBT ", 8) == 0);
        if (!again) return reply;
        freeReplyObject(reply);
    }
    return NULL;
}

static int example(redisContext *connection) {
    char request[64];
    const char *steps[][3] = {{"STOCK.SET", "c-mug", "10"}, {"STOCK.DECR", "c-mug", "3"}, {"STOCK.DECR", "c-mug", "8"}};
    const char *outcomes[] = {"OK", "OK", "INSUFFICIENT"};
    for (int i = 0; i < 3; i++) {
        /* Any text that is not used again within the window of ten minutes; a UUID is one. */
        snprintf(request, sizeof request, "c-%lld-%d-%d", (long long)time(NULL), rand(), i);
        redisReply *reply = change(&connection, steps[i][0], steps[i][1], steps[i][2], request);
        /* A refusal is a reply, not an error: element 0 tells. */
        if (reply == NULL || reply->type != REDIS_REPLY_ARRAY || strcmp(reply->element[0]->str, outcomes[i]) != 0) {
            fprintf(stderr, "%s: %s\n", steps[i][0], reply == NULL ? connection->errstr : reply->str ? reply->str : "another outcome");
            return 1;
        }
        printf("%s %s\n", steps[i][0], reply->element[0]->str);
        freeReplyObject(reply);
    }
    return 0;
}

static void print_text(const char *text, size_t length) {
    putchar('"');
    for (size_t i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)text[i];
        if (byte == '"' || byte == '\\') printf("\\%c", byte);
        else if (byte < 0x20) printf("\\u%04x", byte);
        else putchar(byte);
    }
    putchar('"');
}

static void print_reply(const redisReply *reply) {
    switch (reply->type) {
    case REDIS_REPLY_INTEGER: printf("%lld", reply->integer); break;
    case REDIS_REPLY_NIL: printf("null"); break;
    case REDIS_REPLY_ERROR: printf("{\"error\":"); print_text(reply->str, reply->len); putchar('}'); break;
    case REDIS_REPLY_ARRAY:
        putchar('[');
        for (size_t i = 0; i < reply->elements; i++) {
            if (i) putchar(',');
            print_reply(reply->element[i]);
        }
        putchar(']');
        break;
    default: print_text(reply->str, reply->len);
    }
}

static redisReply *command_of(redisContext *connection, char *line) {
    const char *words[2048];
    size_t lengths[2048];
    int count = 0;
    for (char *hex = strtok(line, " \n"); hex != NULL && count < 2048; hex = strtok(NULL, " \n")) {
        /* A lone dot is a word without a byte. */
        size_t length = strcmp(hex, ".") == 0 ? 0 : strlen(hex) / 2;
        char *word = malloc(length + 1);
        for (size_t i = 0; i < length; i++) {
            unsigned int byte;
            sscanf(hex + 2 * i, "%2x", &byte);
            word[i] = (char)byte;
        }
        words[count] = word;
        lengths[count++] = length;
    }
    redisReply *reply = redisCommandArgv(connection, count, words, lengths);
    for (int i = 0; i < count; i++) free((char *)words[i]);
    return reply;
}

static int pipeline(redisContext *connection, int depth) {
    for (int i = 0; i < depth; i++) redisAppendCommand(connection, "STOCK.GET c-mug");
    for (int i = 0; i < depth; i++) {
        redisReply *reply;
        if (redisGetReply(connection, (void **)&reply) != REDIS_OK || reply->type != REDIS_REPLY_INTEGER) return 0;
        freeReplyObject(reply);
    }
    return 1;
}

static int pool(const char *host, int port, int size) {
    redisContext **all = calloc((size_t)size, sizeof *all);
    int good = 1;
    for (int i = 0; i < size; i++) {
        all[i] = redisConnect(host, port);
        good = good && all[i] != NULL && !all[i]->err && redisAppendCommand(all[i], "STOCK.GET c-mug") == REDIS_OK;
    }
    for (int i = 0; i < size; i++) {
        redisReply *reply = NULL;
        good = good && redisGetReply(all[i], (void **)&reply) == REDIS_OK && reply->type == REDIS_REPLY_INTEGER;
        if (reply) freeReplyObject(reply);
        redisFree(all[i]);
    }
    free(all);
    return good;
}

/* Whether the next reply confirms this: `word channel count`. */
static int confirms(redisContext *connection, const char *word, const char *channel) {
    redisReply *reply;
    if (redisGetReply(connection, (void **)&reply) != REDIS_OK) return 0;
    int good = reply->type == REDIS_REPLY_ARRAY && reply->elements == 3 && strcmp(reply->element[0]->str, word) == 0 &&
               strcmp(reply->element[1]->str, channel) == 0;
    freeReplyObject(reply);
    return good;
}

/* Prints the first message. */
static void subscribe(const char *host, int port, const char *channel) {
    redisContext *own = redisConnect(host, port);
    redisReply *message;
    if (own == NULL || own->err || redisAppendCommand(own, "SUBSCRIBE %s", channel) != REDIS_OK || !confirms(own, "subscribe", channel) ||
        redisGetReply(own, (void **)&message) != REDIS_OK) {
        printf("false");
    } else {
        if (message->type == REDIS_REPLY_ARRAY && message->elements == 3 && strcmp(message->element[0]->str, "message") == 0)
            print_reply(message->element[2]);
        else
            printf("false");
        freeReplyObject(message);
    }
    redisFree(own);
}

/* What the server says to the user and the password of the environment; NULL where there are none. */
static redisReply *log_in(redisContext *connection) {
    const char *user = getenv("CLIENT_USER"), *password = getenv("CLIENT_PASSWORD");
    if (user == NULL || password == NULL) return NULL;
    return redisCommand(connection, "AUTH %s %s", user, password);
}

int main(int arguments, char **argument) {
    if (arguments < 3) {
        fprintf(stderr, "usage: holdfast host port [test]\n");
        return 64;
    }
    redisContext *connection = redisConnect(argument[1], atoi(argument[2]));
    if (connection == NULL || connection->err) {
        fprintf(stderr, "%s\n", connection ? connection->errstr : "no memory");
        return 1;
    }
    srand((unsigned int)time(NULL));
    if (arguments == 3) return example(connection);
    redisReply *refused = log_in(connection);
    if (refused != NULL && refused->type != REDIS_REPLY_ERROR) {
        freeReplyObject(refused);
        refused = NULL;
    }
    static char line[1 << 20];
    while (fgets(line, sizeof line, stdin) != NULL) {
        int number;
        char channel[256];
        if (refused != NULL) {
            print_reply(refused);
        } else if (sscanf(line, "pipeline %d", &number) == 1) {
            printf("%s", pipeline(connection, number) ? "true" : "false");
        } else if (sscanf(line, "pool %d", &number) == 1) {
            printf("%s", pool(argument[1], atoi(argument[2]), number) ? "true" : "false");
        } else if (sscanf(line, "subscribe %255s", channel) == 1) {
            subscribe(argument[1], atoi(argument[2]), channel);
        } else {
            redisReply *reply = command_of(connection, line);
            if (reply == NULL) {
                /* What a program does: a new connection, and the same command again if it had a REQUEST. */
                printf("{\"lost\":\"%s\"}", connection->errstr);
                redisReconnect(connection);
            } else {
                print_reply(reply);
                freeReplyObject(reply);
            }
        }
        putchar('\n');
        fflush(stdout);
    }
    freeReplyObject(refused);
    redisFree(connection);
    return 0;
}
