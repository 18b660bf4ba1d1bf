// A worker in Go, tuned by hand: amqp091-go and fasthttp, bounded concurrency, pipelined confirms, acks in batches.
package main

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/valyala/fasthttp"
)

const (
	path     = "/qr/qr-mpm-expire-billnumber"
	attempts = 4
	timeout  = 20 * time.Second
	window   = 1 << 16 // more than can be unacked or unconfirmed
)

var (
	base, _ = url.Parse(os.Getenv("GATEWAY_BASE_URL"))
	secret  = []byte(os.Getenv("GATEWAY_CLIENT_SECRET"))
	client  = os.Getenv("GATEWAY_CLIENT_ID")
	channel = os.Getenv("GATEWAY_CHANNEL_ID")
	queues  = os.Getenv("AMQP_PREFIX")
	conc, _ = strconv.Atoi(os.Getenv("WORKER_CONCURRENCY"))
	zone    = time.FixedZone("WIB", 7*3600)
	prefix  uint64
	serial  uint64
)

func now() string {
	return time.Now().In(zone).Format("2006-01-02T15:04:05.000Z07:00")
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// ---- HTTP ----

type fast struct{ c *fasthttp.HostClient }

func (f fast) post(path, token, stamp, sign, xid string, body []byte) (int, []byte, error) {
	q, r := fasthttp.AcquireRequest(), fasthttp.AcquireResponse()
	defer fasthttp.ReleaseRequest(q)
	defer fasthttp.ReleaseResponse(r)
	q.SetRequestURI(base.Path + path)
	q.Header.SetHost(f.c.Addr)
	q.Header.SetMethod("POST")
	q.Header.SetContentType("application/json")
	q.Header.Set("X-TIMESTAMP", stamp)
	q.Header.Set("X-SIGNATURE", sign)
	if token == "" {
		q.Header.Set("X-CLIENT-KEY", client)
	} else {
		q.Header.Set("Authorization", "Bearer "+token)
		q.Header.Set("X-PARTNER-ID", client)
		q.Header.Set("X-EXTERNAL-ID", xid)
		q.Header.Set("CHANNEL-ID", channel)
		q.Header.Set("X-CHANNEL-ID", channel)
	}
	q.SetBodyRaw(body)
	if err := f.c.Do(q, r); err != nil {
		return 0, nil, err
	}
	return r.StatusCode(), append([]byte(nil), r.Body()...), nil
}

// ---- token ----

type tokens struct {
	sync.Mutex
	p    fast
	tok  string
	till time.Time
}

func (t *tokens) get() (string, error) {
	t.Lock()
	defer t.Unlock()
	if t.tok != "" && time.Now().Before(t.till) {
		return t.tok, nil
	}
	stamp := now()
	digest := sha256.Sum256([]byte(client + "|" + stamp))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key(), crypto.SHA256, digest[:])
	if err != nil {
		return "", err
	}
	sign := base64.StdEncoding.EncodeToString(signature)
	_, b, err := t.p.post("/access-token/b2b", "", stamp, sign, "", []byte(`{"grantType":"client_credentials"}`))
	if err != nil {
		return "", err
	}
	var d struct{ AccessToken, ExpiresIn string }
	if err = json.Unmarshal(b, &d); err != nil || d.AccessToken == "" {
		return "", errors.New("no token")
	}
	s, err := strconv.Atoi(d.ExpiresIn)
	t.tok, t.till = d.AccessToken, time.Now().Add(time.Duration(s-30)*time.Second)
	return t.tok, err
}

func key() *rsa.PrivateKey {
	text, err := os.ReadFile(os.Getenv("GATEWAY_PRIVATE_KEY_FILE"))
	must(err)
	block, _ := pem.Decode(text)
	if found, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return found
	}
	found, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	must(err)
	return found.(*rsa.PrivateKey)
}

func (t *tokens) drop(tok string) {
	t.Lock()
	if t.tok == tok {
		t.tok = ""
	}
	t.Unlock()
}

// ---- one command ----

type outcome struct {
	OutcomeID    string `json:"outcomeId"`
	CommandID    string `json:"commandId"`
	Billnumber   string `json:"billnumber"`
	Status       string `json:"status"`
	ResponseCode string `json:"responseCode"`
	Attempts     int    `json:"attempts"`
	ExternalID   string `json:"externalId"`
	CompletedAt  string `json:"completedAt"`
}

func sign(token, stamp string, body []byte) string {
	d := sha256.Sum256(body)
	h := hmac.New(sha512.New, secret)
	b := make([]byte, 0, 256)
	b = append(append(append(b, "POST:"+path+":"...), token...), ':')
	b = b[:len(b)+64]
	hex.Encode(b[len(b)-64:], d[:])
	b = append(append(b, ':'), stamp...)
	h.Write(b)
	return base64.StdEncoding.EncodeToString(h.Sum(make([]byte, 0, 64)))
}

func expire(id string, raw []byte, p fast, t *tokens) (outcome, error) {
	var cmd struct {
		Billnumber     string
		AdditionalInfo struct{ MerchantID string }
	}
	if err := json.Unmarshal(raw, &cmd); err != nil {
		return outcome{}, err
	}
	if cmd.Billnumber == "" || cmd.AdditionalInfo.MerchantID == "" {
		return outcome{}, errors.New("bad message")
	}
	var min bytes.Buffer
	min.Grow(len(raw))
	must(json.Compact(&min, raw))
	o := outcome{CommandID: id, Billnumber: cmd.Billnumber, Status: "unresolved"}
	for o.Attempts < attempts {
		o.Attempts++
		status := 0
		o.ResponseCode = "network"
		var body []byte
		tok, err := t.get()
		if err == nil {
			o.ExternalID = fmt.Sprintf("%010d%012d", prefix, atomic.AddUint64(&serial, 1))
			stamp := now()
			status, body, err = p.post(path, tok, stamp, sign(tok, stamp, min.Bytes()), o.ExternalID, min.Bytes())
		}
		if err == nil {
			var a struct{ ResponseCode string }
			_ = json.Unmarshal(body, &a)
			o.ResponseCode = a.ResponseCode
			if status == 200 {
				o.Status = "expired"
				break
			}
			if status == 401 {
				t.drop(tok)
				continue
			}
			if status < 500 && status != 429 {
				break
			}
		}
		time.Sleep(20 * time.Millisecond << o.Attempts)
	}
	made := sha256.Sum256([]byte(id + "\n" + o.Status))
	o.OutcomeID = hex.EncodeToString(made[:16])
	o.CompletedAt = now()
	return o, nil
}

// ---- AMQP ----

func main() {
	debug.SetGCPercent(400)
	var r [8]byte
	_, err := rand.Read(r[:])
	must(err)
	prefix = binary.LittleEndian.Uint64(r[:]) % 10_000_000_000
	p := fast{&fasthttp.HostClient{Addr: base.Host, MaxConns: conc, ReadTimeout: timeout, WriteTimeout: timeout,
		MaxConnWaitTimeout: timeout, NoDefaultUserAgentHeader: true, DisableHeaderNamesNormalizing: true, MaxIdemponentCallAttempts: 1}}
	t := &tokens{p: p}

	conn, err := amqp.Dial(os.Getenv("AMQP_URL"))
	must(err)
	in, err := conn.Channel()
	must(err)
	out, err := conn.Channel()
	must(err)
	must(out.Confirm(false))
	returned, closed := out.NotifyReturn(make(chan amqp.Return)), conn.NotifyClose(make(chan *amqp.Error, 1))
	go func() { // unbuffered, and a return comes before its confirm: nothing returned is ever acked
		if m, ok := <-returned; ok {
			log.Fatal("returned: ", m.ReplyText)
		}
	}()
	confirmed := out.NotifyPublish(make(chan amqp.Confirmation, 4096))
	prefetch := 2 * conc
	must(in.Qos(prefetch, 0, false))
	deliveries, err := in.Consume(queues+".sweep", "", false, false, false, false, nil)
	must(err)

	var tagOf [window]uint64 // by publish number
	var publishing sync.Mutex
	var published uint64
	for i := 0; i < conc; i++ {
		go func() {
			for d := range deliveries {
				o, err := expire(d.MessageId, d.Body, p, t)
				if err != nil {
					log.Print(err)
					must(in.Reject(d.DeliveryTag, false))
					continue
				}
				body, err := json.Marshal(o)
				must(err)
				publishing.Lock()
				published++
				atomic.StoreUint64(&tagOf[published%window], d.DeliveryTag)
				err = out.Publish(queues+".outcomes", "sweep."+o.Status, true, false, amqp.Publishing{ContentType: "application/json",
					DeliveryMode: 2, MessageId: o.OutcomeID, CorrelationId: o.CommandID, Body: body})
				publishing.Unlock()
				must(err)
			}
		}()
	}
	go func() {
		var done [window]bool
		low, acked := uint64(1), uint64(0)
		for c := range confirmed {
			for more := true; more; {
				if !c.Ack {
					log.Fatal("nack")
				}
				done[atomic.LoadUint64(&tagOf[c.DeliveryTag%window])%window] = true
				select {
				case c, more = <-confirmed:
				default:
					more = false
				}
			}
			for ; done[low%window]; low++ {
				done[low%window] = false
			}
			if low-1 > acked {
				acked = low - 1
				must(in.Ack(acked, true))
			}
		}
	}()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-stop:
		conn.Close()
	case e := <-closed:
		log.Fatal(e)
	}
}
